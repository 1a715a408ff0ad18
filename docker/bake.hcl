# All images: docker buildx bake -f docker/bake.hcl  (make images passes docker/versions.env). SBOM and provenance go with each.
variable "VERSION" { default = "dev" }
variable "REGISTRY" { default = "fluxgate" }
variable "DEBIAN_IMAGE" { default = "" }
variable "CUDA_IMAGE" { default = "" }
variable "COMFYUI_VERSION" { default = "" }
variable "COMFY_CLI_VERSION" { default = "" }
variable "CUDA_VERSION" { default = "" }
variable "SIMPLETUNER_VERSION" { default = "" }
variable "SIMPLETUNER_TORCH_INDEX" { default = "" }

group "default" { targets = ["gateway", "comfyui", "trainer"] }

target "_all" {
  context = "."
  attest  = ["type=sbom", "type=provenance,mode=max"]
}

target "gateway" {
  inherits   = ["_all"]
  dockerfile = "docker/gateway/Dockerfile"
  tags       = ["${REGISTRY}/gateway:${VERSION}"]
  args       = { DEBIAN_IMAGE = DEBIAN_IMAGE, VERSION = VERSION }
}

target "comfyui" {
  inherits   = ["_all"]
  dockerfile = "docker/comfyui/Dockerfile"
  tags       = ["${REGISTRY}/comfyui:${COMFYUI_VERSION}"]
  args = {
    CUDA_IMAGE = CUDA_IMAGE, COMFYUI_VERSION = COMFYUI_VERSION, COMFY_CLI_VERSION = COMFY_CLI_VERSION, CUDA_VERSION = CUDA_VERSION, VERSION = VERSION
  }
}

target "trainer" {
  inherits   = ["_all"]
  dockerfile = "docker/trainer/Dockerfile"
  tags       = ["${REGISTRY}/trainer:${VERSION}"]
  args = {
    CUDA_IMAGE = CUDA_IMAGE, SIMPLETUNER_VERSION = SIMPLETUNER_VERSION, SIMPLETUNER_TORCH_INDEX = SIMPLETUNER_TORCH_INDEX, VERSION = VERSION
  }
}

target "local" {
  inherits   = ["_all"]
  dockerfile = "docker/local/Dockerfile"
  tags       = ["${REGISTRY}/local:${VERSION}"]
  args       = { DEBIAN_IMAGE = DEBIAN_IMAGE, VERSION = VERSION }
}
