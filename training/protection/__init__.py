"""How old knowledge is kept: importance of weights and the pulls that use it."""
