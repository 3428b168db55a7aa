"""The science table: does each of SimCLRv2's three stages help, on small images and two CPU cores?"""
