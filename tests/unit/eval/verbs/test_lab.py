"""What `astra lab` reads of a command line."""

from astra_jax.cli.main import main


def test_the_command_line_leaves_the_command_alone(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("eval.verbs.lab.main", seen.append)
    command = ["astra", "run", "x", "--debug", "--json", "out", "--a_b", "--", "-c", "{host}"]
    assert main(["lab", "run", "--rate", "10mbit", "--packet-loss", "5%", "--debug", "--", *command]) == 0
    assert seen[0].command == tuple(command) and seen[0].hosts == 4 and seen[0].packet_loss == "5%"
    monkeypatch.undo()
    assert main(["lab", "run", "--rate", "10mbit"]) == 2
    assert "there is nothing to run: give a command after --" in capsys.readouterr().err
