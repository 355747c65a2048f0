"""Videos in classes: fit, validate, test, predict."""
