# make build   everything that zswapd needs: system packages, Python packages in .venv, the native module
# make install    what make build has made, under PREFIX (/usr) of DESTDIR, with units for systemd; make uninstall
# make demo    real pages through a real swap device, every one checked
# make test    all tests (needs root for the swap device; says what it skips)
# make test-vm  virtual machines: tests/qemu/README.md (root, x86-64; many minutes)
# make model   the races of the native core, under model checkers (ARCHITECTURE.md, "How races are checked")
# make mutants brings bugs back, one at a time, to see that the models notice
# make sanitize  the core's tests under AddressSanitizer, ThreadSanitizer and Miri, as far as Rust here has them
# make fuzz    all that parses bytes from outside, under cargo-fuzz: each target for FUZZ_SECONDS (60)
# make bench-pool   how fast the pool is, how long it makes readers wait, how densely it packs (some minutes)
# make lint    formatting, lints, types
# make lock    choose the newest Python packages: rewrites requirements*.lock, which pin them with hashes
# make clean   remove what the above have made here

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: build install uninstall demo test test-vm vm model mutants sanitize fuzz bench-pool lint lock clean system

PYTHON := .venv/bin/python
NATIVE := zswapd/_native.abi3.so
PAGER := zswapd/zswapd-pager
KEEPER := zswapd/zswapd-keeper
NATIVE_SOURCES := pyproject.toml $(shell find native \( -path native/target -o -path native/fuzz \) -prune -o \
    \( -name '*.rs' -o -name 'Cargo.*' \) -print)
# mkswap, swapon and losetup, where a user's PATH lacks them.
export PATH := $(PATH):/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

build: $(NATIVE) $(PAGER) $(KEEPER)

# pyfuse3 comes as source: what builds it is pinned too, and goes first.
.venv/.packages: requirements.lock requirements-build.lock | system
	@echo "zswapd: Python packages into .venv"
	$(PYTHON) -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
	$(PYTHON) -m pip install --quiet --require-hashes -r requirements-build.lock
	$(PYTHON) -m pip install --quiet --require-hashes --no-build-isolation -r requirements.lock
	touch $@

$(NATIVE): .venv/.packages $(NATIVE_SOURCES) | system
	@echo "zswapd: native module (the first time takes a minute or two)"
	# All that it needs is installed: maturin's pip has nothing to fetch.
	VIRTUAL_ENV=$(CURDIR)/.venv PIP_NO_INDEX=1 PIP_QUIET=1 $(PYTHON) -m maturin develop --release --locked
	touch $@

# Beside the Python modules, where zswapd looks for them. Renamed into place: the old one may be running.
$(PAGER) $(KEEPER): $(NATIVE_SOURCES) | system
	@cargo build --manifest-path native/Cargo.toml --quiet --locked --release --package $(@F)
	cp native/target/release/$(@F) $@.new
	mv $@.new $@

# Installs what is missing, and only that. Looks for the things themselves, not for packages: they may come from
# elsewhere.
system:
	@fail() { echo "zswapd: $$*" >&2; exit 1; }
	have() { command -v "$$1" >/dev/null; }
	# An environment that works stays, whatever python3 is now.
	python=$(PYTHON)
	$(PYTHON) -c '' 2>/dev/null || python=python3
	rust_is_fit() {
	    local version
	    version=$$(cargo --version 2>/dev/null | cut -d' ' -f2)
	    have rustc && [[ -n $$version && $$(printf '1.85\n%s\n' "$$version" | sort -V | head -n 1) == 1.85 ]]
	}
	missing=()
	have $$python || missing+=(python3)
	$$python -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
	$$python -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
	    missing+=(python3-dev)
	have gcc || missing+=(gcc libc6-dev)
	have pkg-config || missing+=(pkg-config)
	pkg-config --exists fuse3 2>/dev/null || missing+=(libfuse3-dev)
	have fusermount3 || missing+=(fuse3)
	have mkswap || missing+=(util-linux)
	have losetup && have swapon || missing+=(mount)
	rust_is_fit || missing+=($$(grep -q 'VERSION_ID="12"' /etc/os-release && echo rustc-web cargo-web || echo rustc cargo))
	if [[ -n $${missing[*]} ]]; then
	    have apt-get || fail "missing: $${missing[*]} (Debian's names; Rust 1.85 or later): install them and run make again"
	    [[ $$EUID == 0 ]] || fail "packages are missing, run: sudo apt-get install $${missing[*]}"
	    echo "zswapd: installing $${missing[*]}"
	    export DEBIAN_FRONTEND=noninteractive
	    apt-get -qq update
	    apt-get -qq install --no-install-recommends $${missing[*]} >/dev/null ||
	        fail "apt-get could not install: $${missing[*]}"
	fi
	rust_is_fit || fail "Rust 1.85 or later is needed, and apt has none: install it with rustup and run make again"
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	    fail "Python 3.11 or later is needed, python3 is $$($$python --version): put a later one first in PATH"

PREFIX ?= /usr
DESTDIR ?=
LIB := $(PREFIX)/lib/zswapd
UNITS := $(notdir $(wildcard systemd/*.service))
# The version for which it is installed; of this machine's, unless it is said.
SYSTEMD ?= $(shell systemctl --version 2>/dev/null | sed -n '1s/systemd \([0-9]*\).*/\1/p' | grep . || echo 0)
CONFIG := $(DESTDIR)/etc/zswapd/zswapd.toml

# A configuration that is there stays as it is. The old programs may be running: all is replaced, nothing overwritten.
install: build
	@$(PYTHON) install/lay_out.py "$(DESTDIR)" "$(LIB)" "$(PREFIX)/bin"
	[[ -e $(CONFIG) ]] || install -Dm 644 config/zswapd.toml $(CONFIG)
	install -Dm 644 config/sysctl.conf $(DESTDIR)$(PREFIX)/lib/sysctl.d/60-zswapd.conf
	install -Dm 644 config/tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/zswapd.conf
	install -Dm 644 -t $(DESTDIR)$(PREFIX)/share/zswapd/prometheus config/prometheus/*
	install -Dm 644 -t $(DESTDIR)$(PREFIX)/share/zswapd/grafana config/grafana/*
	install -Dm 644 -t $(DESTDIR)$(PREFIX)/share/doc/zswapd README.md ARCHITECTURE.md MEASURED.md CHANGELOG.md LICENSE
	for unit in $(UNITS); do
	    install -Dm 644 systemd/$$unit $(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit
	    sed -i 's|/usr/bin/zswap|$(PREFIX)/bin/zswap|; s|/usr/share/doc|$(PREFIX)/share/doc|' \
	        $(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit
	done
	if (( $(SYSTEMD) >= 254 )); then
	    install -Dm 644 systemd/preserve.conf $(DESTDIR)$(PREFIX)/lib/systemd/system/zswapd-pager.service.d/preserve.conf
	fi
	if [[ -z "$(DESTDIR)" && -d /run/systemd/system ]]; then
	    systemctl daemon-reload
	    systemd-tmpfiles --create zswapd.conf
	    /lib/systemd/systemd-sysctl 60-zswapd.conf
	    echo "zswapd: installed; to start it with the machine: systemctl enable --now zswapd zswapd-swap"
	    echo "zswapd: where it runs already: systemctl reload zswapd-pager && systemctl restart zswapd"
	fi

# What holds pages is not uninstalled. A configuration that was changed stays, and is said.
uninstall:
	@if [[ -z "$(DESTDIR)" ]]; then
	    if [[ -d /run/systemd/system ]]; then systemctl disable --now $(UNITS); fi
	    if pgrep -x zswapd-pager >/dev/null; then
	        echo "zswapd: a pager runs: end it with zswapctl stop" >&2
	        exit 1
	    fi
	fi
	if cmp -s config/zswapd.toml $(CONFIG); then rm $(CONFIG); fi
	rm -rf --one-file-system $(DESTDIR)$(LIB) $(DESTDIR)$(PREFIX)/share/{,doc/}zswapd
	rm -f $(DESTDIR)$(PREFIX)/bin/{zswapd,zswapctl} $(DESTDIR)$(PREFIX)/lib/sysctl.d/60-zswapd.conf \
	    $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/zswapd.conf $(UNITS:%=$(DESTDIR)$(PREFIX)/lib/systemd/system/%)
	rm -rf --one-file-system $(DESTDIR)$(PREFIX)/lib/systemd/system/zswapd-pager.service.d
	# A directory that nobody else uses.
	[[ ! -d $(dir $(CONFIG)) ]] || rmdir --ignore-fail-on-non-empty $(dir $(CONFIG))
	[[ ! -e $(CONFIG) ]] || echo "zswapd: $(CONFIG) was changed, and stays"
	if [[ -z "$(DESTDIR)" && -d /run/systemd/system ]]; then systemctl daemon-reload; fi

demo: build
	@$(PYTHON) -m zswapd.bench.demo

test: build vm
	$(PYTHON) -m pytest tests/unit
	# Ends itself if a worker allocates: a test swaps through it.
	cargo build --manifest-path native/Cargo.toml --quiet --locked --package zswapd-pager
	# Beside the compilers: for the most part they wait. In the background, SIGINT would be ignored.
	mkdir -p build
	env --default-signal=INT $(PYTHON) -m pytest tests/fuse >build/test-fuse.log 2>&1 &
	status=0
	cargo test --manifest-path native/Cargo.toml --quiet --locked &&
	    cargo test --manifest-path native/Cargo.toml --quiet --locked --release || status=$$?
	wait $$! || status=$$?
	cat build/test-fuse.log
	((status == 0)) || exit $$status
	$(PYTHON) -m pytest tests/swap tests/prometheus
	$(VM_TESTS) tests/qemu -k quick
	echo "zswapd: all tests passed"

# Guests' disks and what is laid over their roots, some 500 MB, stay in /tmp only after a failure.
VM_TESTS := $(PYTHON) -m pytest -o tmp_path_retention_policy=failed

# Two guests at a time, one from each half: a guest keeps little more than one processor busy.
test-vm: build vm
	@mkdir -p build
	half() { env --default-signal=INT $(VM_TESTS) -v --durations=0 "$$@"; }
	half tests/qemu/test_scenarios.py >build/test-vm.log 2>&1 &
	status=0
	half tests/qemu --ignore=tests/qemu/test_scenarios.py || status=$$?
	wait $$! || status=$$?
	cat build/test-vm.log
	exit $$status

# What a virtual machine needs (its tests get the kernels and make a root: 250 MB in all), where it can be had: those tests are
# skipped elsewhere, and say what is missing.
vm:
	@[[ $$(uname -m) == x86_64 && $$EUID == 0 ]] && command -v apt-get >/dev/null || exit 0
	apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || apt-get -qq update
	missing=()
	have() { command -v "$$1" >/dev/null; }
	have qemu-system-x86_64 || missing+=(qemu-system-x86)
	have mmdebstrap || missing+=(mmdebstrap)
	have mksquashfs || missing+=(squashfs-tools)
	have busybox || missing+=(busybox-static)
	have depmod || missing+=(kmod)
	if [[ -n $${missing[*]} ]]; then
	    echo "zswapd: installing $${missing[*]}"
	    export DEBIAN_FRONTEND=noninteractive
	    install() { apt-get -qq install --no-install-recommends $${missing[*]} >/dev/null; }
	    # The lists may be old.
	    install || { apt-get -qq update && install; } || echo "zswapd: apt-get could not install: $${missing[*]}" >&2
	fi

FUZZ_SECONDS ?= 60

# What a target finds stays in native/fuzz/artifacts, and what covers new ground in native/fuzz/corpus, for the next run.
fuzz:
	@missing() { echo "zswapd: $$*" >&2; exit 1; }
	command -v rustup >/dev/null && rustup run nightly rustc --version >/dev/null 2>&1 ||
	    missing "fuzzing needs a nightly Rust: install rustup (https://rustup.rs), then: rustup toolchain install nightly"
	cargo +nightly fuzz --version >/dev/null 2>&1 || missing "cargo-fuzz is missing: cargo install --locked cargo-fuzz"
	command -v c++ >/dev/null || missing "libFuzzer needs a C++ compiler: apt-get install g++"
	cd native
	cargo +nightly fetch --quiet --locked --manifest-path fuzz/Cargo.toml
	# The codecs' C code too. Without use-after-scope, which gcc reports where there is none (zstd_opt.c).
	export CFLAGS="-fsanitize=address -fno-sanitize-address-use-after-scope"
	for target in $$(cargo +nightly fuzz list); do
	    echo "zswapd: fuzzing $$target for $(FUZZ_SECONDS) s"
	    # Without a line for every input that is kept.
	    cargo +nightly fuzz run "$$target" -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 2>&1 |
	        grep --line-buffered -vE '^(#[0-9]+[[:space:]]+(NEW|REDUCE)|[[:space:]]+NEW_FUNC|")'
	done

bench-pool: build
	cargo bench --manifest-path native/Cargo.toml --locked --package zswapd-core --bench pool --bench pauses
	$(PYTHON) -m zswapd.bench.density

MODEL := cargo test --manifest-path native/Cargo.toml --quiet --locked --package zswapd-core --lib

model: | system
	@$(MODEL) --features loom models::
	$(MODEL) --features shuttle models::
	echo "zswapd: all models hold"

mutants: | system
	@tests/mutants/run

sanitize: | system
	@tests/sanitize

lint: build
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m mypy
	cargo fmt --version >/dev/null && cargo clippy --version >/dev/null || {
	    echo "zswapd: cargo fmt and clippy are needed: rustup component add rustfmt clippy; or Debian 13: apt-get install" \
	        "rustfmt rust-clippy; Debian 12: apt-get install rustfmt-web rust-web-clippy" >&2
	    exit 1
	}
	cd native
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --quiet --locked --all-targets -- -D warnings

lock:
	python3 -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet uv
	compile() {
	    build/lock/bin/uv pip compile "$$@" --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	        --no-emit-index-url --custom-compile-command "make lock" --quiet
	}
	compile pyproject.toml --extra dev --output-file requirements.lock
	printf '%s\n' cython pip setuptools setuptools-scm |
	    compile - --constraint requirements.lock --output-file requirements-build.lock
	rm -r build/lock

clean:
	rm -rf --one-file-system .venv build native/target native/fuzz/{target,corpus,artifacts,coverage} $(NATIVE) $(PAGER) $(KEEPER) \
	    .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find zswapd tests -name __pycache__ -prune -exec rm -r {} +
