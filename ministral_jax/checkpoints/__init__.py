"""Files of weights: read exactly and in bounded memory, in either published layout, and written back."""
