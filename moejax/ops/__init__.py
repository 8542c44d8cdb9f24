"""Pure functions on local arrays: what is computed. The first function of a file is its reference, the slow twin."""
