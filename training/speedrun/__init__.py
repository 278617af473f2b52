"""A speedrun: data, autoencoder, U-Net, evaluation and a report page, in the time given, on whatever machine it is."""
