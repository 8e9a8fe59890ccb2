"""The methods, grouped; every module's ``METHODS`` is found by itself."""
