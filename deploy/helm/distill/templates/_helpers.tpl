{{- define "distill.name" -}}
{{- $name := ternary .Release.Name (printf "%s-distill" .Release.Name) (contains "distill" .Release.Name) }}
{{- $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/*
What selects the pods of one component: (list $ "triton"). Without app.kubernetes.io/name: on Ray's pods KubeRay's own Services select by its
value.
*/}}
{{- define "distill.selector" -}}
app.kubernetes.io/part-of: distill
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "distill.labels" -}}
{{ include "distill.selector" . }}
app.kubernetes.io/name: distill
app.kubernetes.io/version: {{ (first .).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (first .).Release.Service }}
helm.sh/chart: {{ (first .).Chart.Name }}-{{ (first .).Chart.Version }}
{{- end }}

{{/* What every pod begins with. */}}
{{- define "distill.pod" -}}
serviceAccountName: {{ include "distill.name" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether these resources hold a GPU, or a part of one: words or nothing. */}}
{{- define "distill.hasGpu" -}}
{{- range $name, $count := .limits }}
{{- if and (hasPrefix "nvidia.com/" $name) (int $count) }}{{ $name }}{{ end }}
{{- end }}
{{- end }}

{{/* What a container may do: (list $ RESOURCES-OF-ITS-POD), or $ for one in a pod without a GPU. */}}
{{- define "distill.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  {{- if and (kindIs "slice" .) (include "distill.hasGpu" (last .)) }}
  readOnlyRootFilesystem: {{ (first .).Values.gpuContainers.readOnlyRootFilesystem }}
  {{- else }}
  readOnlyRootFilesystem: true
  {{- end }}
  capabilities: {drop: [ALL]}
{{- end }}

{{/*
Settings that the teacher's job and the trainer share, as a list: with different ones the trainer would take the teacher for another one.
For the same reason nothing is said of a teacher that was made elsewhere. Of several words for one setting the last counts: `run.overrides`
win.
*/}}
{{- define "distill.settings" -}}
- run_dir=/srv/distill/runs/{{ .Values.run.name }}
{{- if and (include "distill.hasGpu" .Values.triton.resources) (or .Values.teacher.job.enabled (eq .Values.trainer.verb "quickstart")) }}
- teacher.repository.instance_kind=gpu  # the default is to serve on the CPU
{{- end }}
{{- with .Values.run.overrides }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "distill.place" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "distill.runsClaim" -}}
{{ .Values.runs.existingClaim | default (printf "%s-runs" (include "distill.name" .)) }}
{{- end }}

{{- define "distill.config" -}}
{{ .Values.run.existingConfigMap | default (printf "%s-run" (include "distill.name" .)) }}
{{- end }}

{{/* Where Triton finds its models inside the container. */}}
{{- define "distill.repository" -}}
{{- if .Values.triton.modelRepository.existingClaim -}}
{{ printf "/models/%s" .Values.triton.modelRepository.path | trimSuffix "/" }}
{{- else -}}
/srv/distill/runs/{{ .Values.run.name }}/model_repository
{{- end }}
{{- end }}

{{/* What the trainer's pods and the teacher's job mount. */}}
{{- define "distill.workMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: runs, mountPath: /srv/distill/runs}
- {name: run, mountPath: /etc/distill, readOnly: true}
{{- if .Values.data.existingClaim }}
- {name: data, mountPath: /srv/distill/data, readOnly: true}
{{- end }}
{{- end }}

{{- define "distill.workVolumes" -}}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.trainer.sharedMemory }}}
- name: runs
  persistentVolumeClaim: {claimName: {{ include "distill.runsClaim" . }}}
- name: run
  configMap: {name: {{ include "distill.config" . }}}
{{- with .Values.data.existingClaim }}
- name: data
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Of a Ray container. KubeRay's own ask with wget, unless it is new; the image has none. */}}
{{- define "distill.rayProbes" -}}
readinessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  initialDelaySeconds: 10
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 10
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 30
{{- end }}

{{/* Otherwise Ray says that the disk of a pod is empty. */}}
{{- define "distill.rayDisk" -}}
- {name: RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE, value: "1"}
{{- end }}

{{- define "distill.secretEnv" -}}
{{- with .Values.trainer.secretEnv }}
envFrom:
{{- range . }}
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "distill.checks" -}}
{{- if and (or .Values.trainer.enabled .Values.teacher.job.enabled) (not .Values.run.config) (not .Values.run.existingConfigMap) }}
{{- fail "the trainer and the teacher's job need a run file: give run.config (--set-file run.config=run.yaml) or run.existingConfigMap, or turn trainer.enabled and teacher.job.enabled off" }}
{{- end }}
{{- $given := printf "\n%s" (join "\n" .Values.run.overrides) }}
{{- if and (or .Values.trainer.enabled .Values.teacher.job.enabled) (not .Values.data.existingClaim) (not .Values.run.existingConfigMap) (not (contains "\ndata." $given)) }}
{{- range $name, $images := (fromYaml .Values.run.config).data }}
{{- if and (kindIs "map" $images) (hasPrefix "data/" (toString $images.path)) }}
{{- fail (printf "data.%s.path of the run file is %s, and no claim is mounted at data/: name the claim that holds these images in data.existingClaim" $name $images.path) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.gateway.ingress.enabled (not .Values.gateway.ingress.host) }}
{{- fail "gateway.ingress.enabled needs gateway.ingress.host" }}
{{- end }}
{{- if and .Values.gateway.ingress.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.gatewayFrom) }}
{{- fail "gateway.ingress.enabled, and networkPolicy.gatewayFrom lets only pods of this namespace ask the gateway: name the ingress controller there, such as [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}], or [{podSelector: {}}] where it is in this namespace" }}
{{- end }}
{{- $rolling := .Values.triton.rollingUpdate }}
{{- if and (eq (toString $rolling.maxSurge | trimSuffix "%") "0") (eq (toString $rolling.maxUnavailable | trimSuffix "%") "0") }}
{{- fail "triton.rollingUpdate: maxSurge and maxUnavailable are both 0, so no Triton could ever be replaced; make one of them 1" }}
{{- end }}
{{- if and .Values.trainer.enabled (ne .Values.trainer.verb "self-distill") (not (kindIs "invalid" (index (fromYaml .Values.run.config) "self_distill"))) (not (hasSuffix "-self-distilled" .Values.model)) }}
{{- fail (printf "the run file has self_distill, so its students ask %s-self-distilled, and Triton loads %s alone; take self_distill out of it, or see `A run with self_distill` in docs/kubernetes.md" .Values.model .Values.model) }}
{{- end }}
{{- end }}
