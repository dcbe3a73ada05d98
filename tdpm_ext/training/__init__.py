"""Training of learned priors, and of a truncated model as a whole. Needs ``accelerate`` (extra ``train``)."""
