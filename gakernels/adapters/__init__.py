"""What generators make: adapters, whole and compact, and their export to PEFT and llama.cpp."""
