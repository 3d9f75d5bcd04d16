# A tour of a docker host. Each line is run by a shell with both daemons; what it prints and how it ends must be the same.
# IMG is an image with busybox; the working directory is empty at first, and each daemon's own.

# Images
docker images --format '{{.Repository}}:{{.Tag}}'
docker tag IMG tour/box:1
docker tag IMG tour/box:2
docker tag nonesuch tour/none
docker tag IMG UPPER
docker images --format '{{.Repository}}:{{.Tag}}' tour/box
docker images --format '{{.Repository}}:{{.Tag}}' -f reference='tour/*:2'
docker images -q tour/box | sort -u | wc -l
docker images -q -f dangling=true
docker images -f nonsense=1
docker images --format '{{.Repository}}:{{.Tag}}' nonesuch
docker image inspect -f '{{json .RepoTags}} {{.Os}} {{.Architecture}} {{json .Config.Cmd}} {{json .Config.Env}} {{len .RootFS.Layers}} {{.RootFS.Type}}' tour/box:1
docker image inspect -f '{{.Id}}' tour/box:1
docker image inspect nonesuch
docker history --format '{{.CreatedBy}}|{{.Comment}}' tour/box:1
docker history nonesuch
docker save tour/box:1 | tar -xO manifest.json | grep -o '"RepoTags":[^]]*.'
docker save -o image.tar tour/box:1 tour/box:2
docker save nonesuch
docker rmi tour/box:1 tour/box:2
docker load -i image.tar
docker load -q -i image.tar
docker load -i nonesuch.tar
docker rmi nonesuch
docker rmi
docker rmi -f tour/box:2
docker rmi tour/box:1

# Containers that end
docker run --rm IMG echo hello
docker run --rm IMG sh -c 'echo out; echo err >&2; exit 3'
echo typed | docker run --rm -i IMG cat
docker run --rm IMG no-such-program >/dev/null 2>&1
docker run --rm IMG /etc >/dev/null 2>&1
docker run --rm --pull never nonesuch
docker run --rm IMG sh -c 'kill -9 $$'
docker run --rm --init IMG ps -o comm
docker run --name ended -e A=b -e C -l one=1 -l two --env-file /dev/null -w /tmp -u 7:8 -h host.example --stop-signal USR1 --cap-drop ALL IMG sh -c 'id; pwd; hostname; echo $A'
docker inspect -f '{{.Name}} {{.State.Status}} {{.State.ExitCode}} {{.State.Running}} {{.State.OOMKilled}} {{.State.Error}} {{.RestartCount}} {{.Platform}}' ended
docker inspect -f '{{.Path}} {{json .Args}} {{json .Config.Cmd}} {{json .Config.Labels}} {{.Config.WorkingDir}} {{.Config.User}} {{.Config.StopSignal}} {{json .Config.Entrypoint}}' ended
docker inspect -f '{{range .Config.Env}}{{println .}}{{end}}' ended | sort
docker inspect -f '{{.Config.Hostname}} {{.Config.Domainname}} {{.Config.AttachStdin}} {{.Config.AttachStdout}} {{.Config.Tty}} {{.Config.OpenStdin}} {{.Config.StdinOnce}} {{.Config.Image}}' ended
docker inspect -f '{{json .HostConfig.CapDrop}} {{json .HostConfig.Binds}} {{json .HostConfig.PortBindings}} {{json .HostConfig.RestartPolicy}} {{.HostConfig.AutoRemove}} {{.HostConfig.NetworkMode}} {{json .HostConfig.Links}} {{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}} {{.HostConfig.LogConfig.Type}}' ended
docker logs ended
docker logs -n 1 ended
docker logs -n nonsense ended
docker start ended
docker wait ended
docker start -a ended
docker rm ended
docker rm ended
docker inspect ended
docker run
docker run --name 'no good' IMG
docker run --rm -v relative/path:/x IMG true
docker run --rm -p 99999:1 IMG true
docker run --rm -m 1m IMG true
docker run --rm --restart always IMG true
docker run --rm --restart sometimes IMG true
docker run --rm -w relative IMG true
docker run --rm --network nonesuch IMG true
docker run --rm --volumes-from nonesuch IMG true
docker run --rm --cpus 1000 IMG true
docker run --rm --health-interval -1s IMG true
docker create --name taken IMG
docker create --name taken IMG
docker rm taken

# A container that goes on
docker run -d --name goes -l tour=yes -p 127.0.0.1:18080:80 -p 53/udp --restart on-failure:2 IMG sh -c 'trap "echo got it" USR1; trap "exit 4" TERM; echo bad >&2; echo ready; sleep 100000 & while :; do wait $!; done'
until docker logs goes 2>&1 | grep -q ready; do sleep 0.1; done
docker ps --format '{{.Names}}|{{.Image}}|{{.Command}}|{{.State}}|{{.Networks}}|{{.LocalVolumes}}|{{.Label "tour"}}'
docker ps -q | wc -l
docker ps -a --format '{{.Names}}' -f label=tour=yes
docker ps -a --format '{{.Names}}' -f publish=18080
docker ps -a --format '{{.Names}}' -f publish=80
docker ps -a --format '{{.Names}}' -f expose=53/udp
docker ps -a --format '{{.Names}}' -f ancestor=IMG -f status=running
docker ps -f nonsense=1
docker ps -f status=nonsense
docker port goes 80
docker port goes 81
docker inspect -f '{{json .HostConfig.PortBindings}} {{json .HostConfig.RestartPolicy}} {{json (index .NetworkSettings.Ports "80/tcp")}} {{len .NetworkSettings.Networks}} {{json .Config.ExposedPorts}}' goes
docker logs goes 2>&1 | sort
docker logs goes 2>/dev/null
docker logs --tail 0 goes
docker logs -t goes 2>/dev/null
docker logs --since 1h --details goes 2>/dev/null
docker logs --until 2001-01-01 goes
docker logs --since nonsense goes
docker logs nonesuch
docker exec goes echo hello
docker exec -e X=y -w /etc -u 1 goes sh -c 'echo $X; pwd; id'
docker exec goes sh -c 'exit 7'
docker exec goes no-such-program >/dev/null 2>&1; echo $?
echo in | docker exec -i goes cat
docker exec -d goes touch /tmp/detached
docker exec nonesuch true
docker exec goes
docker top goes -o pid,comm | sed 's/^[0-9]* */N /'
docker top goes nonsense
docker stats --no-stream --format '{{.Name}} {{.PIDs}}' goes
docker kill -s USR1 goes
until docker logs goes 2>&1 | grep -q 'got it'; do sleep 0.1; done
docker kill -s NONSENSE goes
docker pause goes
docker ps --format '{{.Names}} {{.State}}'
docker exec goes true
docker pause goes
docker unpause goes
docker unpause goes
docker rename goes went
docker rename went went
docker rename went 'no good'
docker rename nonesuch x
docker rename went goes
docker update --restart no goes
docker update --memory 4m goes
docker update goes
docker inspect -f '{{json .HostConfig.RestartPolicy}}' goes
docker rm goes
docker rmi IMG

# Files
echo content >file; docker cp -q file goes:/root/file
docker cp -q goes:/root/file back && cat back
docker cp -q goes:/nonesuch . 
docker cp -q nonesuch goes:/
docker cp -q file nonesuch:/
docker exec goes sh -c 'echo more >>/root/file; mkdir /made; rm /tmp/detached; touch /etc/passwd'
docker diff goes | sort
docker diff nonesuch
docker export goes | tar -xO root/file
docker export goes | docker import -m said -c 'CMD ["cat","/root/file"]' - tour/imported:1
docker run --rm tour/imported:1
docker history --format '{{.CreatedBy}}|{{.Comment}}' tour/imported:1
docker commit -a me -m why -c 'ENV D=e' -c 'LABEL x=y' -c 'CMD ["sh","-c","cat /root/file; echo $D"]' goes tour/committed
docker run --rm tour/committed
docker inspect -f '{{.Author}} {{.Comment}} {{json .Config.Env}} {{json .Config.Labels}} {{json .Config.Cmd}} {{len .RootFS.Layers}} {{json .Config.ExposedPorts}}' tour/committed
docker commit goes 'no good'
docker commit nonesuch x

# Its end
docker stop -t 5 goes
docker stop goes
docker inspect -f '{{.State.Status}} {{.State.ExitCode}} {{.State.Pid}} {{json .NetworkSettings.Ports}}' goes
docker ps -a --format '{{.Names}} {{.State}}' -f exited=4
docker kill goes
docker pause goes
docker exec goes true
docker top goes
docker stats --no-stream --format '{{.Name}} {{.PIDs}}' goes
docker cp -q goes:/root/file back2 && cat back2
docker logs goes 2>/dev/null
docker port goes
docker start goes
docker restart -t 5 goes
docker inspect -f '{{.State.Status}} {{.RestartCount}}' goes
docker rm -f goes
docker rm -f goes

# Health and restarts
docker run -d --name ill --health-cmd 'echo bad; exit 1' --health-interval 200ms --health-retries 1 IMG sleep 1000
until docker ps -f health=unhealthy -q | grep -q .; do sleep 0.1; done
docker inspect -f '{{.State.Health.Status}} {{json .Config.Healthcheck}} {{(index .State.Health.Log 0).ExitCode}} {{json (index .State.Health.Log 0).Output}}' ill
docker rm -f ill
docker run -d --name again --restart on-failure:1 IMG sh -c 'echo once; exit 5'
until docker inspect -f '{{.RestartCount}} {{.State.Status}}' again | grep -q '1 exited'; do sleep 0.1; done
docker inspect -f '{{.State.ExitCode}} {{.RestartCount}} {{.State.Restarting}}' again
docker logs again
docker rm again

# Volumes
docker volume create --label a=b data
docker volume create data
docker volume create 'no good'
docker volume ls --format '{{.Name}} {{.Driver}} {{.Scope}} {{.Labels}}'
docker volume ls -q -f label=a=b
docker volume ls -q -f nonsense=1
docker volume inspect -f '{{.Name}} {{.Driver}} {{.Scope}} {{json .Labels}} {{json .Options}}' data
docker volume inspect nonesuch
docker run --name user -v data:/data --mount type=volume,target=/anonymous --tmpfs /t:size=1m IMG sh -c 'echo kept >/data/f; df /t | grep -c tmpfs'
docker inspect -f '{{range .Mounts}}{{.Type}} {{.Destination}} {{.Driver}} {{.RW}} {{.Mode}} {{.Propagation}}{{println}}{{end}}{{json .HostConfig.Tmpfs}}' user | sort
docker run --rm --volumes-from user:ro IMG cat /data/f
docker volume rm data 2>&1
docker volume ls -q | wc -l
docker rm -v user
docker volume ls -q
docker run --rm -v data:/data:ro IMG sh -c 'cat /data/f; touch /data/g'
docker volume ls -q -f dangling=true
docker volume prune -f --filter label=nonesuch
docker volume rm data
docker volume rm data
docker run --rm -v "$PWD/file:/f:ro" IMG cat /f
docker run --rm --mount type=bind,source=/nonesuch/x,target=/f IMG cat /f

# Networks
docker network create --label a=b --subnet 10.77.0.0/24 --gateway 10.77.0.1 net1
docker network create net1
docker network create --subnet 10.77.0.0/25 net2
docker network create --subnet nonsense net2
docker network inspect -f '{{.Name}} {{.Driver}} {{.Scope}} {{.Internal}} {{.Attachable}} {{json .Labels}} {{json .IPAM.Config}} {{len .Containers}}' net1
docker network ls --format '{{.Name}} {{.Driver}} {{.Scope}}' -f label=a=b
docker network ls -q -f name=nonesuch
docker network ls -f nonsense=1
docker network inspect nonesuch
docker run -d --name peer --network net1 --ip 10.77.0.9 --network-alias other IMG sleep 1000
docker inspect -f '{{with index .NetworkSettings.Networks "net1"}}{{.IPAddress}} {{.IPPrefixLen}} {{.Gateway}} {{json .IPAMConfig}}{{end}}' peer
docker run --rm --network net1 IMG ping -c 1 -q other | sed -n 1p
docker network inspect -f '{{range .Containers}}{{.Name}} {{.IPv4Address}}{{end}}' net1
docker network connect net1 peer
docker network rm net1 2>&1
docker network connect bridge peer
docker inspect -f '{{len .NetworkSettings.Networks}}' peer
docker network disconnect bridge peer
docker network disconnect bridge peer
docker network connect nonesuch peer
docker network connect net1 nonesuch
docker rm -f peer
docker network rm net1
docker network rm net1
docker network rm bridge
docker network prune -f

# Events
date +%s.%N >since; docker run --name short -l who=me IMG sh -c 'exit 3'; docker start short; docker wait short; docker rm -f short >/dev/null
docker events --since "$(cat since)" --until $(($(date +%s) + 1)) -f container=short --format '{{.Type}} {{.Action}} {{index .Actor.Attributes "exitCode"}}'
docker events --since "$(cat since)" --until $(($(date +%s) + 1)) -f type=network --format '{{.Type}} {{.Action}} {{.Actor.Attributes.name}}'
docker events --since "$(cat since)" --until $(($(date +%s) + 1)) -f event=die --format '{{.Action}} {{.Actor.Attributes.who}} {{.Actor.Attributes.image}}'
docker events --since nonsense
docker run -d --name stops IMG sh -c 'trap exit TERM; while :; do sleep 0.1; done'
date +%s.%N >since; docker stop stops; docker start stops; docker restart -t 0 stops; docker kill stops; docker rm stops
docker events --since "$(cat since)" --until $(($(date +%s) + 1)) -f type=container --format '{{.Action}} {{.Actor.Attributes.signal}}'

# The host
docker system df --format '{{.Type}} {{.TotalCount}} {{.Active}}'
docker info --format '{{.OSType}} {{.Architecture}} {{.Driver}} {{.Containers}} {{.Images}} {{.LoggingDriver}} {{json .Warnings}}'
docker version --format '{{.Server.Os}} {{.Server.Arch}}'
docker system prune -f
docker container prune -f
docker image prune -f
docker images --format '{{.Repository}}:{{.Tag}}'
docker rmi tour/committed tour/imported:1
docker swarm leave
docker service ls
docker secret ls
docker plugin ls
docker node ls
docker ps -aq
