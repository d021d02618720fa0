"""One recorded pass, and the rules that turn it into maps."""
