"""Single layers: arrays in, arrays out. Modules are values, built once and never changed."""
