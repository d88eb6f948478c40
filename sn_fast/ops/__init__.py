"""The operators: schema, fake, reference and autograd. The only package that will call the compiled module."""
