"""Example configs. They are installed with the package, because `pipe quickstart` uses one of them."""
