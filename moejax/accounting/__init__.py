"""Numbers on paper against numbers from the compiler: weights, FLOPs, memory, bytes on the wire."""
