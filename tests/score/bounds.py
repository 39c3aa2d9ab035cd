"""What must hold of the miniature model and of its lesson: every threshold, and what is drawn to see."""

PROMPTS = 50
FEW_PROMPTS = 12
"""Of the fifty, for `make test`."""
STEPS = 28
FEW_STEPS = 14
"""For `make test`, on the same schedule."""
GUIDANCE = 4.0
SIDE = 128
"""Pixels."""
SEED = 50
"""Of the fifty scenes; picture number n starts from the noise of seed n."""

FOLLOWS = 0.80
"""Share of the base's pictures with the caption's colours and shapes, at least."""
AREA = 0.95
"""Area under the curve by which the style statistic tells the lesson's pictures from the base's, at least."""
STYLE = 0.70
"""Share of the way from the base's ink to the lesson's that a good adapter goes, at least."""
CONTENT = 0.70
"""Share of pictures in the lesson's style with the caption's colours and shapes, at least."""
FALLS_TO = 0.90
"""Mean loss of the last fifth of the lesson's steps over that of the first, at most."""
PEAK_BYTES = 2e9
"""Of the process of any stage, at most."""
