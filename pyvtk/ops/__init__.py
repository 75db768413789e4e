"""One page per family: schema, fake kernel, argument checks, autograd and public functions."""
