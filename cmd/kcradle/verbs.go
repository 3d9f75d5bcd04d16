package main

// verbs is the table of verbs; each has a file of its own. To add one, write newVERB and add a row.
func verbs() []verb {
	return []verb{
		{groupPod, newSummon},
		{groupPod, newRun},
		{groupPod, newPs},
		{groupPod, newStop},
		{groupPod, newKill},
		{groupPod, newRm},
		{groupPod, newWait},
		{groupPod, newLogs},
		{groupPod, newExec},
		{groupPod, newAttach},
		{groupPod, newCp},
		{groupPod, newInspect},
		{groupPod, newEnv},
		{groupImage, newPull},
		{groupImage, newImages},
		{groupImage, newLoad},
		{groupImage, newRmi},
		{groupImage, newPrune},
		{groupAttestation, newVerify},
		{groupAttestation, newMeasure},
		{groupAttestation, newReference},
		{groupAttestation, newCerts},
		{groupAttestation, newSNP},
		{groupHost, newDoctorCommand},
		{groupHost, newDaemon},
		{groupHost, newDebug},
		{groupHost, newTemplate},
		{groupHost, newPool},
		{groupHost, newPackage},
		{groupHost, newVersion},
		{groupHost, newDocs},
	}
}
