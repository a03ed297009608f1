"""The one file that emitted programs stand on besides torch; `autopar.rewrite` saves a copy beside each
program."""
