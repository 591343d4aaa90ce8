"""What a compiler says of the programs for a machine that is not at hand: memory, work, communication."""
