from zswapd.entry import zswapd

zswapd()
