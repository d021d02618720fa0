"""How right the predictions and the masks are, with intervals."""
