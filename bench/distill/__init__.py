"""What distilling costs, beside training without a teacher and beside two peers."""
