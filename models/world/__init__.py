"""The drawn world: a closed world of procedurally drawn pictures and the words for them.

`scene` says what may be in a picture, `draw` makes the pixels, `words` makes the captions and the names of concepts.
Every model of the sketch suite is trained on it, and on nothing else.
"""
