"""How alike activations of groups of texts are: cosines with controls, steps between layers, read-outs, weight masks, translations.

Imported by the methods that compare groups; imports no method.
"""
