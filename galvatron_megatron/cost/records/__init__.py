"""Public tables of measured runs, as plans that can be priced."""
