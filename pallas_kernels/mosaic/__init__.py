"""What every Mosaic GPU kernel shares: the target it is made for, and dependent launch."""
