"""What measurements are made of; each bench that uses it is a module of `bench`."""
