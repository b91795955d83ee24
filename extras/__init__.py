"""What the paper does not need: others' entropy controls, SaEI in TRL, one attack, a curriculum."""
