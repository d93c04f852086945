"""Plans: what a config needs and costs on a topology, before a chip is paid for."""
