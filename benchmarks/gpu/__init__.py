"""What only a GPU can show: speed, memory, synchronisations, attention, exact resumption."""
