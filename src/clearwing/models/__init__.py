"""The residual family, the Classifier around it, and how foreign networks come in."""
