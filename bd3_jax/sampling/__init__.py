"""Network -> tokens. Pure functions of (parameters, keys, canvas), one compiled function for every prompt."""
