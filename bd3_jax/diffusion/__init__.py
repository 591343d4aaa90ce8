"""The mathematics: noise, corruption, objectives, likelihood. Knows no network, no file, no device."""
