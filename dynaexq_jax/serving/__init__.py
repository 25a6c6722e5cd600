"""From a model directory to text: loading, generating, scoring."""
