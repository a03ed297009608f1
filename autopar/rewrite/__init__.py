"""From a plan to a parallel torch program: localize, cut into stages, and print as source a person would
write.
"""
