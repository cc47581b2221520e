"""Where the programs begin, before what takes time: importing everything else."""

import signal


def zswapd() -> None:
    _end_without_a_word()
    from zswapd.cli import main

    main()


def zswapctl() -> None:
    _end_without_a_word()
    from zswapd.ctl import main

    main()


def _end_without_a_word() -> None:
    """Until somebody listens to it, Ctrl-C ends a program as it ends most: by the signal, and without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
