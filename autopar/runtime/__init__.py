"""What emitted programs stand on besides torch, a module for each idea.

`autopar.rewrite.bundle` saves the definitions that a program reaches in one file beside it, so they share a
namespace: every name is defined once in the package, and none is renamed where it is imported.
"""
