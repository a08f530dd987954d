"""Trains and exports the models of the sketch suite. Run each module from the folder `models`: `python -m train.captioner`."""
