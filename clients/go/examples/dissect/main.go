// Dissect labels units of a network: `dissect ENDPOINT TARGET PICTURES LAYER:UNIT...`, the target and the folder of pictures by paths that the mesh can read.
package main

import (
	"context"
	"fmt"
	"log"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	dnd "dnd.example/go"
	"dnd.example/go/dndv1"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 5 {
		log.Fatal("usage: dissect ENDPOINT TARGET PICTURES LAYER:UNIT...")
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		log.Fatal("error: ", err)
	}
}

func run(endpoint, target, pictures string, asked []string) error {
	request := &dndv1.DissectRequest{
		Target:     &dndv1.Target{Uri: uri(target)},
		ProbingSet: &dndv1.ProbingSet{Sources: []*dndv1.ProbingSource{{Source: &dndv1.ProbingSource_Uri{Uri: uri(pictures)}}}},
	}
	units := map[string]*dndv1.LayerUnits{}
	for _, at := range asked {
		name, number, _ := strings.Cut(at, ":")
		unit, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			return err
		}
		if units[name] == nil {
			units[name] = &dndv1.LayerUnits{Layer: name}
			request.Layers = append(request.Layers, units[name])
		}
		units[name].Units = append(units[name].Units, uint32(unit))
	}

	client, connection, err := dnd.Connect(endpoint, dnd.Options{})
	if err != nil {
		return err
	}
	defer connection.Close()
	result, err := client.Dissect(context.Background(), request, func(stage *dndv1.StageProgress) {
		log.Printf("%s %d/%d", stage.GetStage(), stage.GetDone(), stage.GetTotal())
	})
	if err != nil {
		return err
	}
	for _, unit := range result.Units() {
		fmt.Printf("%s\t%d\t%s\n", unit.GetLayer(), unit.GetUnit(), unit.GetLabel())
	}
	return nil
}

func uri(path string) string {
	if absolute, err := filepath.Abs(path); err == nil {
		path = absolute
	}
	return (&url.URL{Scheme: "file", Path: path}).String()
}
