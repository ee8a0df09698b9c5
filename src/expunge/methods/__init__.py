"""The methods of erasing, one a file, named as the paper names them."""
