"""What the paper does not need: entropy controls of other methods, SaEI inside TRL, one attacked image, SENT's curriculum."""
