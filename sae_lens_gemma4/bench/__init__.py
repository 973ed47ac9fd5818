"""What the package costs: speed and memory as ratios within one run, accuracy beside them."""
