"""The vision networks, one file each.

The seam that they share: data.py says how an image becomes pieces (a tile, or a whole image) and how many tokens these
cost, and makes the pixels; an encoder turns pieces (pieces, 3, height, width) into features (pieces, tokens, features).
What follows is the same for all and stands in model.py: reduce, connector, arrange.
"""
