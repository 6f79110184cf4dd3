"""The bundled model: synthetic passkey documents, their vocabulary, the training and the evaluation."""
