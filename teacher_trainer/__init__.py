"""The first two stages of SimCLRv2: pretrain a big network without labels, fine-tune it on few of them."""
