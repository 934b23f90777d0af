"""How good a result is: image metrics, and the comparison on scenes whose true novel views are known."""
