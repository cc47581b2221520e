"""`zswapctl analyze`: what each codec, level, dictionary and tier would save on real pages, and what it would cost.

sources.py finds the pages, sample.py takes some of them, codecs.py compresses these, estimate.py makes memory and
processor time of that, advice.py a configuration; show.py and picture.py are for people, command.py ties it together.
"""
