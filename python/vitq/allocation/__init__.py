"""Which bits go where: what a layer's bits do to the output, what they cost, and the exact frontier between the two."""
