from zswapd.cli import main

main()
