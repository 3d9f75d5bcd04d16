package vdocker

import (
	"net/http"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
)

// absent is the table of what docker's engine does and a pod does not: each says so in a sentence, with a status that
// clients understand.
func (s *server) absent() []dockerapi.Route {
	const (
		fixed    = "a pod's containers are fixed by its pod.json"
		noImages = "a pod holds the images of its pod.json and no others"
		noSwarm  = `This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`
	)
	no := func(method, path, sentence string) dockerapi.Route {
		return dockerapi.Route{Method: method, Path: path, Handle: refuse(http.StatusNotImplemented, sentence)}
	}
	swarm := func(method, path string) dockerapi.Route {
		return dockerapi.Route{Method: method, Path: path, Handle: refuse(http.StatusServiceUnavailable, noSwarm)}
	}
	noPlugin := func(method, path string) dockerapi.Route {
		return dockerapi.Route{Method: method, Path: path, Handle: func(_ http.ResponseWriter, r *dockerapi.Request) error {
			return dockerapi.NotFound("plugin %q not found", r.Var("name"))
		}}
	}
	return []dockerapi.Route{
		no("POST", "/containers/create", fixed+"; summon another pod for another container"),
		no("POST", "/containers/prune", fixed+"; none can be removed"),
		{Method: "DELETE", Path: "/containers/{id}", Handle: s.container(func(_ http.ResponseWriter, k call) error {
			return dockerapi.Conflict("cannot remove container %q: %s; remove the whole pod with kcradle rm", k.c.Name(), fixed)
		})},
		{Method: "GET", Path: "/containers/{id}/checkpoints", Handle: emptyList},
		no("POST", "/containers/{id}/checkpoints", "a pod has no checkpoints"),
		no("DELETE", "/containers/{id}/checkpoints/{checkpoint}", "a pod has no checkpoints"),

		no("POST", "/build", "nothing is built in a pod"),
		no("POST", "/build/prune", "nothing is built in a pod"),
		no("POST", "/build/cancel", "nothing is built in a pod"),
		no("POST", "/commit", noImages+"; export the container instead"),
		no("POST", "/session", "nothing is built in a pod"),
		no("POST", "/grpc", "nothing is built in a pod"),
		no("POST", "/auth", "a pod speaks to no registry"),

		no("POST", "/images/create", noImages+"; pull on the host with kcradle pull"),
		no("POST", "/images/load", noImages),
		no("POST", "/images/prune", noImages+"; none can be removed"),
		no("GET", "/images/search", "a pod speaks to no registry"),
		no("GET", "/images/get", noImages+", unpacked; save them on the host"),
		no("GET", "/images/{name+}/get", noImages+", unpacked; save them on the host"),
		no("POST", "/images/{name+}/push", "a pod speaks to no registry"),
		no("POST", "/images/{name+}/tag", noImages),
		{Method: "DELETE", Path: "/images/{name+}", Handle: s.pod(func(_ http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
			if _, err := findImage(p, r.Var("name")); err != nil {
				return err
			}
			return dockerapi.Conflict("unable to remove image %q: the pod's containers use it", r.Var("name"))
		})},
		no("GET", "/distribution/{name+}/json", "a pod speaks to no registry"),

		no("POST", "/networks/create", "a pod has the one network that its host gave it"),
		no("POST", "/networks/prune", "a pod has the one network that its host gave it"),
		no("POST", "/networks/{id}/connect", "a pod has the one network that its host gave it"),
		no("POST", "/networks/{id}/disconnect", "a pod has the one network that its host gave it"),
		{Method: "DELETE", Path: "/networks/{id}", Handle: s.pod(func(_ http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
			if !networkIs(p, r.Var("id")) {
				return dockerapi.NotFound("network %s not found", r.Var("id"))
			}
			return dockerapi.Errorf(http.StatusForbidden, "%s is a pre-defined network and cannot be removed", networkName(p))
		})},

		no("POST", "/volumes/create", "a pod's volumes are fixed by its pod.json"),
		no("POST", "/volumes/prune", "a pod's volumes are fixed by its pod.json"),
		no("PUT", "/volumes/{name}", "cluster volumes need a swarm, which a pod cannot join"),
		{Method: "DELETE", Path: "/volumes/{name}", Handle: s.pod(func(_ http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
			for _, v := range p.Spec().Volumes {
				if v.Name == r.Var("name") {
					return dockerapi.Conflict("remove %s: the pod's volumes are fixed by its pod.json", v.Name)
				}
			}
			return dockerapi.NotFound("get %s: no such volume", r.Var("name"))
		})},

		no("GET", "/plugins/privileges", "a pod has no plugins"), no("POST", "/plugins/pull", "a pod has no plugins"),
		no("POST", "/plugins/create", "a pod has no plugins"),
		noPlugin("GET", "/plugins/{name+}/json"), noPlugin("DELETE", "/plugins/{name+}"),
		noPlugin("POST", "/plugins/{name+}/enable"), noPlugin("POST", "/plugins/{name+}/disable"),
		noPlugin("POST", "/plugins/{name+}/push"), noPlugin("POST", "/plugins/{name+}/upgrade"),
		noPlugin("POST", "/plugins/{name+}/set"),

		no("POST", "/swarm/init", "a pod is one machine and cannot join a swarm"),
		no("POST", "/swarm/join", "a pod is one machine and cannot join a swarm"), swarm("GET", "/swarm"), swarm("POST", "/swarm/leave"),
		swarm("POST", "/swarm/update"), swarm("GET", "/swarm/unlockkey"), swarm("POST", "/swarm/unlock"),
		swarm("GET", "/nodes"), swarm("GET", "/nodes/{id}"), swarm("DELETE", "/nodes/{id}"), swarm("POST", "/nodes/{id}/update"),
		swarm("GET", "/services"), swarm("POST", "/services/create"), swarm("GET", "/services/{id}"),
		swarm("DELETE", "/services/{id}"), swarm("POST", "/services/{id}/update"), swarm("GET", "/services/{id}/logs"),
		swarm("GET", "/tasks"), swarm("GET", "/tasks/{id}"), swarm("GET", "/tasks/{id}/logs"),
		swarm("GET", "/secrets"), swarm("POST", "/secrets/create"), swarm("GET", "/secrets/{id}"),
		swarm("DELETE", "/secrets/{id}"), swarm("POST", "/secrets/{id}/update"),
		swarm("GET", "/configs"), swarm("POST", "/configs/create"), swarm("GET", "/configs/{id}"),
		swarm("DELETE", "/configs/{id}"), swarm("POST", "/configs/{id}/update"),
	}
}

func refuse(status int, sentence string) dockerapi.Handler {
	return func(http.ResponseWriter, *dockerapi.Request) error {
		return dockerapi.Errorf(status, "%s", sentence)
	}
}
