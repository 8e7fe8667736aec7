from tests.infra.conftest import Scripts
from tests.services.cloud import Cloud

def test_a_run(cloud: Cloud, scripts: Scripts) -> None:
    cloud.machines.lives = [("ACCEPTED", "PROVISIONING", "ACTIVE", "exit 0")]
    done = scripts.run("submit", "smoke", "--wait", "--run-id", "r1")
    print(done.err)
    print(done.out)
    print(len(cloud.requests), cloud.machines.most_alive, cloud.machines.alive, cloud.names("test-bucket"))
    assert done.code == 0
